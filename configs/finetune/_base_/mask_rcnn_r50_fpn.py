# Mask R-CNN with nothing frozen, SyncBN in backbone, FPN and mask head, and the standard box head of two
# fully connected layers.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "runtime.py", "data_masks.py", "schedule_1x.py"]
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(frozen_stages=-1, norm_cfg=norm_cfg, norm_eval=False, init_cfg=None),
    neck=dict(norm_cfg=norm_cfg),
    roi_head=dict(mask_head=dict(norm_cfg=norm_cfg)),
)
