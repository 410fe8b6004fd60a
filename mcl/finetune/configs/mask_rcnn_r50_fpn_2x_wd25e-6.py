# COCO: the paper's Mask R-CNN, ResNet-50 FPN, 2x schedule, weight decay 2.5e-5.
# This is SoCo's weight decay, which the authors' script uses in a second set of runs.
_base_ = "mask_rcnn_r50_fpn_2x.py"
optim_wrapper = dict(optimizer=dict(weight_decay=2.5e-5))
