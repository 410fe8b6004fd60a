# COCO: the paper's Mask R-CNN with ConvNeXt-T, 1x schedule.
# Optimiser, layer-wise learning rate decay and stochastic depth are those of MMDetection's own configuration.
_base_ = "mask_rcnn_r50_fpn_1x.py"
model = dict(
    backbone=dict(
        _delete_=True,
        type="mmpretrain.ConvNeXt",
        out_indices=[0, 1, 2, 3],
        gap_before_final_norm=False,
        drop_path_rate=0.4,
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(
    constructor="LearningRateDecayOptimizerConstructor",
    optimizer=dict(_delete_=True, type="AdamW", lr=1e-4, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(_delete_=True, decay_rate=0.95, decay_type="layer_wise", num_layers=6),
)
