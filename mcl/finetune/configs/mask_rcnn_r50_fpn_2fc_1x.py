# COCO: Mask R-CNN with the standard box head, ResNet-50 FPN, 1x schedule.
# Only backbone and FPN are pre-trained.
_base_ = "_base_/mask_rcnn_r50_fpn.py"
