# COCO: Mask R-CNN with the standard box head, ResNet-50 FPN, 1x schedule.
# What comes from pre-training is backbone and FPN alone.
_base_ = "_base_/mask_rcnn_r50_fpn.py"
