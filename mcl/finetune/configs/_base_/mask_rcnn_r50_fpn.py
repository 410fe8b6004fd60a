# Mask R-CNN with nothing frozen, SyncBN in backbone and FPN, and the standard heads: a box head of two fully connected
# layers and a mask head without normalisation.
_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "runtime.py", "data_masks.py", "schedule_1x.py"]
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    backbone=dict(frozen_stages=-1, norm_cfg=norm_cfg, norm_eval=False, init_cfg=None),
    neck=dict(norm_cfg=norm_cfg),
)
