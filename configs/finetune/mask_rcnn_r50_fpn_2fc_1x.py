# Standard box head: what comes from pre-training is backbone and FPN alone.
_base_ = "_base_/mask_rcnn_r50_fpn.py"
