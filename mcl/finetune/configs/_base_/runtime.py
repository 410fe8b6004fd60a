# Keys of `mcl finetune`, and what all detectors have in common. `key=value` on the command line overrides any of these
# files' keys, e.g. train_cfg.max_iters=1000.
name = ""  # of the run, whose folder is output/name; empty: that of the configuration file
output = "runs"
data = dict(
    root="",  # COCO-format folder
    classes=[],  # names of categories; empty: all of the annotations
    index="",  # folder of the indices of image sizes; empty: the user's cache
    fraction=1.0,  # of the training images, for training with few labels
    fraction_seed=0,  # that chooses them
    max_bad_fraction=0.01,  # of the training images may be broken; others replace them
)
timeout = 600.0  # seconds that a batch may take to come from the loaders' processes
weights = (
    ""  # a file of mcl's or of another library, or torchvision:resnet50, ...: docs/weights.md; empty: from scratch
)
parts = []  # of the weights that must be there: backbone, fpn, head; empty: the backbone, and others if they are there
epochs = None  # a number sets train_cfg.max_iters to so many passes over the training images
test = False  # evaluates the run's newest checkpoint, or load_from, instead of training
devices = "auto"  # a number, a list of GPUs, or auto: all GPUs; for what no launcher, such as torchrun, has started
amp = False  # mixed precision, on a GPU

default_scope = "mmdet"
custom_imports = dict(
    imports=[
        "mcl.finetune.beside_transformers",  # first
        "mcl.finetune.decoding",
        "mcl.finetune.hooks",
        "mcl.finetune.layers",
        "mcl.finetune.loading",
        "mcl.finetune.lvis_ap",
        "mcl.finetune.metric",
        "mcl.finetune.voc_ap",
    ]
)
randomness = dict(seed=0)
resume = True  # continues the run that the folder holds
load_from = None
log_level = "INFO"
log_processor = dict(type="LogProcessor", window_size=20, by_epoch=False)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=20),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=2500, max_keep_ckpts=3),
)
custom_hooks = [
    dict(type="SeedEveryStep"),
    dict(type="PlainMessages"),
    dict(type="PreciseBatchNorm", interval=10000, batches=200),
    dict(type="APTable"),
]
vis_backends = [dict(type="LocalVisBackend")]
visualizer = dict(type="DetLocalVisualizer", vis_backends=vis_backends)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")  # mcl makes loader and evaluator those of val
