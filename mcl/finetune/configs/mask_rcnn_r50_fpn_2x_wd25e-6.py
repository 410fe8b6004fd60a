# COCO: the paper's Mask R-CNN, ResNet-50 FPN, 2x schedule, weight decay 2.5e-5.
# It is SoCo's weight decay, with which the authors' script repeats its runs.
_base_ = "mask_rcnn_r50_fpn_2x.py"
optim_wrapper = dict(optimizer=dict(weight_decay=2.5e-5))
