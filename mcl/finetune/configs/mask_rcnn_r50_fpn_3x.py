# COCO: the paper's Mask R-CNN, ResNet-50 FPN, 3x schedule.
_base_ = "mask_rcnn_r50_fpn_1x.py"
train_cfg = dict(max_iters=270000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=False, milestones=[210000, 250000], gamma=0.1),
]
