# Boxes of a COCO-format folder. The shorter side has 640 to 800 pixels in steps of 32, the longer one at most 1333.
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomChoiceResize", scales=[(1333, short) for short in range(640, 801, 32)], keep_ratio=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
val_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=(1333, 800), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor")),
]
train_dataloader = dict(
    batch_size=2,
    num_workers=4,
    sampler=dict(type="DefaultSampler", shuffle=True),
    batch_sampler=dict(type="EndlessBatches"),
    dataset=dict(
        type="SeededDataset",
        dataset=dict(
            type="COCOFolder",
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
            pipeline=train_pipeline,
        ),
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="COCOFolder", test_mode=True, pipeline=val_pipeline),
)
val_evaluator = dict(type="FolderMetric", metric=["bbox"])
