"""Smoke test of MMDetection: a detector finds boxes, through mmcv's compiled operators."""

from pathlib import Path

import torch

from mcl.exporters.mmdet import import_mmdet


def main() -> None:
    """Runs a small Mask R-CNN with random weights on a random image."""
    import_mmdet()
    import mmcv
    import mmdet
    import mmengine
    import mmpretrain
    from mmdet.models.detectors import MaskRCNN
    from mmdet.structures import DetDataSample

    torch.manual_seed(0)
    mmengine.registry.init_default_scope("mmdet")
    models = Path(mmdet.__file__).parent / ".mim" / "configs" / "_base_" / "models"
    config = mmengine.Config.fromfile(models / "mask-rcnn_r50_fpn.py").model
    config.pop("type")
    config.backbone.update(depth=18, init_cfg=None)
    config.neck.in_channels = [64, 128, 256, 512]
    config.test_cfg.rcnn.score_thr = 0.0
    detector = MaskRCNN(**config).eval()
    image = torch.rand(1, 3, 64, 64)
    sample = DetDataSample(metainfo={"img_shape": (64, 64), "ori_shape": (64, 64), "scale_factor": (1.0, 1.0)})
    with torch.no_grad():
        (result,) = detector.predict(image, [sample])
    boxes = result.pred_instances.bboxes
    assert len(boxes) > 0
    assert boxes.isfinite().all()
    libraries = " ".join(f"{m.__name__} {m.__version__}" for m in (mmengine, mmcv, mmdet, mmpretrain))
    print(f"MMDetection works: {libraries}, torch {torch.__version__}; {len(boxes)} boxes from random weights")


if __name__ == "__main__":
    main()
