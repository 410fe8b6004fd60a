# Keys of `mcl finetune`, and settings that all detectors share. `key=value` on the command line overrides any key of
# these files, e.g. train_cfg.max_iters=1000.
name = ""  # of the run, whose folder is output/name; empty: name of the configuration file
output = "runs"
data = dict(
    root="",  # COCO-format folder
    classes=[],  # names of categories; empty: all of the annotations
    index="",  # folder of the indices of image sizes; empty: the user's cache
    fraction=1.0,  # fraction of the training images to use, for training with few labels
    fraction_seed=0,  # seed that selects them
    max_bad_fraction=0.01,  # fraction of the training images that may be broken; other images replace them
)
timeout = 600.0  # seconds to wait for a batch from the processes that load data
weights = ""  # a file of mcl or another library, or torchvision:resnet50, ...; see docs/weights.md; empty: from scratch
parts = []  # parts of the weights that are required: backbone, fpn, head; empty: backbone, and other parts if available
epochs = None  # a number sets train_cfg.max_iters to that many passes over the training images
test = False  # evaluates the run's newest checkpoint, or load_from, instead of training
devices = "auto"  # a number, a list of GPUs, or auto: all GPUs; ignored under a launcher such as torchrun
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
resume = True  # continues the run in the folder, if there is one
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
test_cfg = dict(type="TestLoop")  # mcl uses the loader and evaluator of val
