# PASCAL VOC 07+12: Faster R-CNN, ResNet-50 C4, 24,000 steps.
# `mcl convert voc` writes voc_train.json (trainval of both years) and voc_val.json (test of 2007).
_base_ = "_base_/faster_rcnn_r50_c4.py"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomChoiceResize", scales=[(1333, short) for short in range(480, 801, 32)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(dataset=dict(pipeline=train_pipeline)))
val_evaluator = dict(type="VOCFolderMetric", metric=["11points", "area"])
train_cfg = dict(max_iters=24000, val_interval=24000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type="MultiStepLR", by_epoch=False, milestones=[18000, 22000], gamma=0.1),
]
