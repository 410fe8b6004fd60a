# The cut-outs of make data: a small Mask R-CNN, ResNet-18 FPN, 28 minutes on a CPU core.
# It detects 8 of the 15 categories. Widths are those of mcl_r18_fpn_demo.yaml. It trains for 12 epochs.
_base_ = "mask_rcnn_r50_fpn_1x.py"
width = 64  # model.width of the pre-training
head_convs = 2  # model.head_convs
data = dict(
    root="data/cutouts",
    classes=["bird", "large_herbivore", "other_mammal", "person", "fruit", "vegetable", "flower", "vehicle"],
)
norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    backbone=dict(depth=18, norm_cfg=norm_cfg),
    neck=dict(in_channels=[64, 128, 256, 512], out_channels=width, norm_cfg=norm_cfg),
    rpn_head=dict(in_channels=width, feat_channels=width, anchor_generator=dict(scales=[4])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=width, finest_scale=28),
        bbox_head=dict(
            type="ConvFCBBoxHead",
            num_shared_convs=head_convs,
            num_shared_fcs=1,
            in_channels=width,
            conv_out_channels=width,
            fc_out_channels=256,
            norm_cfg=norm_cfg,
        ),
        mask_roi_extractor=dict(out_channels=width, finest_scale=28),
        mask_head=dict(num_convs=2, in_channels=width, conv_out_channels=width, norm_cfg=norm_cfg),
    ),
    train_cfg=dict(
        rpn=dict(sampler=dict(num=64)),
        rpn_proposal=dict(nms_pre=500, max_per_img=200),
        rcnn=dict(sampler=dict(num=64)),
    ),
    test_cfg=dict(rpn=dict(nms_pre=500, max_per_img=200), rcnn=dict(max_per_img=50)),
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True, with_mask=True),
    dict(type="RandomChoiceResize", scales=[(320, short) for short in (112, 128, 144)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
val_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(320, 128), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(num_workers=1, dataset=dict(dataset=dict(pipeline=train_pipeline)))
val_dataloader = dict(batch_size=4, num_workers=1, dataset=dict(pipeline=val_pipeline))
global_batch = 8
auto_scale_lr = dict(base_batch_size=8)
optim_wrapper = dict(optimizer=dict(lr=0.06))
train_cfg = dict(max_iters=1200, val_interval=400)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=100),
    dict(type="MultiStepLR", by_epoch=False, milestones=[900, 1100], gamma=0.1),
]
default_hooks = dict(logger=dict(interval=10), checkpoint=dict(interval=100))
custom_hooks = [
    dict(type="SeedEveryStep"),
    dict(type="PlainMessages"),
    dict(type="PreciseBatchNorm", interval=400, batches=20),
    dict(type="APTable"),
]
