# The cut-outs of make data, or your own boxes: a small Faster R-CNN, ResNet-18 FPN, for two CPU cores.
# It is mask_rcnn_r18_fpn_mini.py without masks.
_base_ = "mask_rcnn_r18_fpn_mini.py"
model = dict(type="FasterRCNN", roi_head=dict(mask_roi_extractor=None, mask_head=None))
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomChoiceResize", scales=[(320, short) for short in (112, 128, 144)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(dataset=dict(dataset=dict(pipeline=train_pipeline)))
val_evaluator = dict(metric=["bbox"])
