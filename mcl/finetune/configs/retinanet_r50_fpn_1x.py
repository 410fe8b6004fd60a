# COCO: RetinaNet, ResNet-50 FPN, 1x schedule.
# Its FPN starts at C3, so the pre-trained P2 and box head are not used. P6 and P7 are as in detectron2.
_base_ = [
    "mmdet::_base_/models/retinanet_r50_fpn.py",
    "_base_/runtime.py",
    "_base_/data_boxes.py",
    "_base_/schedule_1x.py",
]
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(frozen_stages=-1, norm_cfg=norm_cfg, norm_eval=False, init_cfg=None),
    neck=dict(type="RetinaFPN", norm_cfg=norm_cfg, relu_before_extra_convs=True),
)
optim_wrapper = dict(optimizer=dict(lr=0.01))
