# COCO, or your own boxes: the paper's detector without masks, ResNet-50 FPN, 1x schedule.
_base_ = "mask_rcnn_r50_fpn_1x.py"
model = dict(type="FasterRCNN", roi_head=dict(mask_roi_extractor=None, mask_head=None))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomChoiceResize", scales=[(1333, short) for short in range(640, 801, 32)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(dataset=dict(pipeline=train_pipeline)))
val_evaluator = dict(metric=["bbox"])
