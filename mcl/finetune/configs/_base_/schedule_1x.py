# detectron2's 1x schedule: 90,000 steps of 16 images, with its warm-up and without weight decay of BatchNorm's scales.
global_batch = 16  # images per step, over all processes
auto_scale_lr = dict(enable=True, base_batch_size=16)  # batch size that optim_wrapper.optimizer.lr is for
train_cfg = dict(type="ResumableLoop", max_iters=90000, val_interval=10000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=1000),
    dict(type="MultiStepLR", by_epoch=False, milestones=[60000, 80000], gamma=0.1),
]
optim_wrapper = dict(
    type="OptimWrapper",
    optimizer=dict(type="SGD", lr=0.02, momentum=0.9, weight_decay=1e-4),
    paramwise_cfg=dict(norm_decay_mult=0.0),
)
