# LVIS v1: Mask R-CNN, ResNet-50 FPN, 1x schedule.
# Images with rare categories are repeated. An image has up to 300 detections, of any score.
_base_ = "mask_rcnn_r50_fpn_1x.py"
train_dataloader = dict(
    dataset=dict(
        dataset=dict(
            _delete_=True,
            type="ClassBalancedDataset",
            oversample_thr=1e-3,
            dataset=dict(
                type="LVISFolder",
                filter_cfg=dict(filter_empty_gt=True, min_size=32),
                pipeline={{_base_.train_pipeline}},
            ),
        )
    )
)
val_dataloader = dict(dataset=dict(type="LVISFolder"))
val_evaluator = dict(type="LVISFolderMetric")
model = dict(test_cfg=dict(rcnn=dict(score_thr=1e-4, max_per_img=300)))
