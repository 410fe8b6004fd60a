# The paper's detector: a box head of 4 convolutions, which are pre-trained, too, and one fully connected layer.
_base_ = "_base_/mask_rcnn_r50_fpn.py"
pretrained = dict(names=[r"backbone\.", r"neck\.", r"roi_head\.bbox_head\.shared_convs\."])
model = dict(
    roi_head=dict(bbox_head=dict(type="Shared4Conv1FCBBoxHead", norm_cfg=dict(type="SyncBN", requires_grad=True)))
)
