# Cityscapes: Mask R-CNN with the standard box head, ResNet-50 FPN, 24,000 steps.
# MMDetection's tools/dataset_converters/cityscapes.py converts its annotations to COCO's format.
_base_ = "mask_rcnn_r50_fpn_2fc_1x.py"
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomChoiceResize", scales=[(2048, short) for short in range(800, 1025, 32)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
val_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(2048, 1024), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(batch_size=1, dataset=dict(dataset=dict(pipeline=train_pipeline)))
val_dataloader = dict(dataset=dict(pipeline=val_pipeline))
global_batch = 8
auto_scale_lr = dict(base_batch_size=8)
optim_wrapper = dict(optimizer=dict(lr=0.01))
train_cfg = dict(max_iters=24000, val_interval=8000)
custom_hooks = [
    dict(type="SeedEveryStep"),
    dict(type="PlainMessages"),
    dict(type="PreciseBatchNorm", interval=8000, batches=200),
    dict(type="APTable"),
]
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=False, milestones=[18000], gamma=0.1),
]
