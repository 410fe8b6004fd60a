# PASCAL VOC 07+12: Faster R-CNN, ResNet-50 C4, 24,000 steps.
# The data are converted to a COCO-format folder: trainval of both years is train, test of 2007 is val. The last stage
# of the backbone is the box head, with one BatchNorm more behind it.
_base_ = [
    "mmdet::_base_/models/faster-rcnn_r50-caffe-c4.py",
    "_base_/runtime.py",
    "_base_/data_boxes.py",
    "_base_/schedule_1x.py",
]
pretrained = dict(
    renames=[(r"^backbone\.layer4\.", "roi_head.shared_head.layer4.")],
    names=[r"backbone\.", r"roi_head\.shared_head\.layer4\."],
)
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(frozen_stages=-1, norm_cfg=norm_cfg, norm_eval=False, style="pytorch", init_cfg=None),
    roi_head=dict(
        shared_head=dict(type="NormedResLayer", norm_cfg=norm_cfg, norm_eval=False, style="pytorch", init_cfg=None)
    ),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomChoiceResize", scales=[(1333, short) for short in range(480, 801, 32)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(dataset=dict(pipeline=train_pipeline)))
train_cfg = dict(max_iters=24000, val_interval=24000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type="MultiStepLR", by_epoch=False, milestones=[18000, 22000], gamma=0.1),
]
