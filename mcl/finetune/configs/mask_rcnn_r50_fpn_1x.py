# COCO: the paper's Mask R-CNN, ResNet-50 FPN, 1x schedule.
# Its box head has 4 convolutions, which are pre-trained as well, and one fully connected layer. The convolutions of the
# box head and of the mask head have SyncBN.
_base_ = "_base_/mask_rcnn_r50_fpn.py"
norm_cfg = dict(type="SyncBN", requires_grad=True)
model = dict(
    roi_head=dict(
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", norm_cfg=norm_cfg),
        mask_head=dict(norm_cfg=norm_cfg),
    )
)
