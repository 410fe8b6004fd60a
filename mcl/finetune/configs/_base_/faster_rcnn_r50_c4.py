# Faster R-CNN whose box head is the last stage of the backbone, followed by one more BatchNorm; nothing is frozen.
_base_ = ["mmdet::_base_/models/faster-rcnn_r50-caffe-c4.py", "runtime.py", "data_boxes.py", "schedule_1x.py"]
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True),
    backbone=dict(frozen_stages=-1, norm_cfg=norm_cfg, norm_eval=False, style="pytorch", init_cfg=None),
    roi_head=dict(
        shared_head=dict(type="NormedResLayer", norm_cfg=norm_cfg, norm_eval=False, style="pytorch", init_cfg=None)
    ),
)
