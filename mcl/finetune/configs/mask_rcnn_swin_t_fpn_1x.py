# COCO: the paper's Mask R-CNN with Swin-T, 1x schedule.
# Optimiser and stochastic depth are those of MMDetection's own configuration.
_base_ = "mask_rcnn_r50_fpn_1x.py"
model = dict(
    backbone=dict(_delete_=True, type="SwinTransformer", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys={"relative_position_bias_table": dict(decay_mult=0.0)}),
)
