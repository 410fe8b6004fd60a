"""Command line of ``mcl``: each verb parses its arguments, makes one call and prints the result."""

import argparse
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from mcl import __version__, signals
from mcl.config import DETECTORS, PRESETS, ConfigError, all_keys

TARGETS = ["mmdet", "mmdet-retinanet", "mmpretrain", "detectron2", "torchvision", "torchvision-detection", "timm"]
TARGETS += ["transformers-detr", "transformers-detr-resnet", "transformers-rtdetr", "ultralytics-rtdetr", "hub"]
"""Those of :data:`mcl.exporters.TARGETS`, which takes seconds to import."""

FEATURES = ["c5", "c4", "c3", "c2", "p5", "p4", "p3", "p2", "projector"]
"""Those of :data:`mcl.evaluation.embedding.FEATURES`."""

_STOPPING = (
    "stopping: training ends after this step and saves a checkpoint; a second signal ends it within 10 seconds without "
    "saving\n"
)

Run = Callable[[argparse.Namespace], Iterable[object]]
"""Implementation of a verb; each item that it yields is printed as a line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point. An error of a class of mcl is printed in one line; the process exits with its code, mostly 2."""
    # OpenMP threads sleep while they wait: on a busy machine, spinning threads take cores from threads that have work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch reads it on import
    parser = _parser()
    options, words = parser.parse_known_args(arguments)  # key=value may follow options
    if words and not ("overrides" in options and all("=" in word and not word.startswith("-") for word in words)):
        hint = "; keys are set by key=value, such as trainer.epochs=3" if "overrides" in options else ""
        parser.error(f"unrecognized arguments: {' '.join(words)}{hint}")
    if words:
        options.overrides = [*options.overrides, *words]
    worker = "MCL_LAUNCHED" in os.environ  # started by mcl.distributed.local, which reports the errors of its processes
    first = os.environ.get("RANK", "0") == "0" and options.verb in ("pretrain", "finetune") and not worker
    try:
        _prepare()
        with signals.a_second_one_ends(_STOPPING if first else ""):
            for text in options.run(options):
                _print(text)
    except signals.Interrupted as stop:
        sys.exit(stop.code)
    except KeyboardInterrupt:
        print(f"mcl {options.verb}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # the reader of the output, such as head, has closed it
        _discard_output()
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, RuntimeError, OSError) as error:
        if type(error).__module__.split(".")[0] in ("mcl", "dali_pipelines"):  # errors that a user can cause
            message = str(error)
        elif isinstance(error, OSError) and error.filename is not None:  # such as a name that is too long
            message = f"{error.filename}: {error.strerror}"
        else:
            raise
        if not worker:
            print(f"mcl {options.verb}: error: {message}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))


def _prepare() -> None:
    """Replaces closed standard streams and checks folders, on which libraries depend.

    Raises:
        ConfigError: the current folder does not exist, or no temporary folder can be written.
    """
    for name in ("stdin", "stdout", "stderr"):  # None if the parent closed it; the next file opened would take its
        if getattr(sys, name) is None:  # descriptor
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: file names may not fit the encoding
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the current folder was deleted; change to one that exists") from None
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise ConfigError("no folder for temporary files is writable; set TMPDIR to one that is") from None


def _print(text: object) -> None:
    """Prints a line.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_output()
        raise ConfigError(f"the output cannot be written ({error.strerror})") from None


def _discard_output() -> None:
    """Discards buffered output, which Python would write on exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="mcl", description="Pre-train detection backbones by MCL (arXiv 2304.02010).")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Run, help: str, **more: Any) -> argparse.ArgumentParser:
        added = verbs.add_parser(name, help=help, formatter_class=argparse.RawDescriptionHelpFormatter, **more)
        added.set_defaults(run=run)
        return added

    def add_overrides(verb: argparse.ArgumentParser, help: str) -> None:
        verb.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=help)

    pretrain = verb(
        "pretrain",
        _pretrain,
        "pre-train from a configuration",
        description="Pre-trains a backbone, or continues the run of the same name. Writes to output/name/.",
        epilog="keys (key=value overrides the YAML file):\n\n" + _keys(),
    )
    pretrain.add_argument("config", type=Path, help="preset, such as mcl_r50_fpn_100e_in1k, or YAML file")
    add_overrides(pretrain, "e.g. data.root=/data/imagenet/train")

    evaluate = verb(
        "evaluate",
        _evaluate,
        "score a checkpoint and a randomly initialised network",
        description="Scores a checkpoint and a randomly initialised network on data.root and data.val_root.",
        epilog=textwrap.dedent("""\
            retrieval  top-1: whether a tile's own image has the most similar target of evaluation.gallery images
            knn        classification by the evaluation.k nearest training images, weighted by cosine similarity
            linear     classification by logistic regression
            svm        mean average precision of one support vector machine per class; evaluation.annotations and
                       evaluation.val_annotations list the classes of each image
            regions    classification of the objects of the COCO-format folder evaluation.regions, by nearest neighbours
                       and logistic regression on features pooled from the pyramid

            evaluation.features selects the features of knn, linear and svm, evaluation.labels the share of images whose
            class they know. Scores of a run's checkpoint are added to evaluations.jsonl and report.html of the run.
            """),
    )
    evaluate.add_argument("name", choices=["retrieval", "knn", "linear", "svm", "regions"], help="described below")
    evaluate.add_argument("checkpoint", type=Path, help="e.g. runs/demo/checkpoints/last.pt")
    add_overrides(evaluate, "e.g. data.root=FOLDER data.val_root=FOLDER")

    embed = verb(
        "embed",
        _embed,
        "write the features of images to a file",
        description="Writes a row of features for each image. An incomplete file is continued.",
    )
    embed.add_argument("checkpoint", type=Path, help="e.g. runs/demo/checkpoints/last.pt")
    embed.add_argument("images", help="folder, list file or shards, as data.root")
    add_overrides(embed, "e.g. data.source=flat montage.cells=7")
    embed.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npy (and .json beside it) or .parquet")
    embed.add_argument(
        "--features",
        choices=FEATURES,
        default="c5",
        help="stage of the backbone or level of the pyramid, averaged over space, or the projector's output; "
        "default: c5",
    )
    embed.add_argument(
        "--plot",
        metavar="pca|umap",
        nargs="?",
        const="pca",
        default="",
        help="draw a map of the images (FILE.png; default: pca) and their nearest neighbours (FILE.html)",
    )

    export = verb("export", _export, "write weights for another library")
    export.add_argument("checkpoint", type=Path, help="e.g. runs/demo/checkpoints/last.pt")
    add_overrides(export, "e.g. data.root=FOLDER, for --network target and --statistics")
    export.add_argument(
        "--to", required=True, choices=TARGETS, help="library that loads the weights; hub: a Hugging Face Hub folder"
    )
    export.add_argument(
        "--parts", type=_words, default=[], help="e.g. backbone,fpn,head; default: all parts that the library has"
    )
    export.add_argument(
        "--network", choices=["online", "target"], default="online", help="target: the momentum network"
    )
    export.add_argument(
        "--statistics",
        default="",
        metavar="FOLDER|none",
        help="images from which BatchNorm statistics are computed; default: data.root for libraries that freeze them",
    )
    export.add_argument(
        "--verify", action="store_true", help="load the weights into the library's model and compare features"
    )
    export.add_argument(
        "--classifier", action="store_true", help="also export the classifier of objective=supervised; needs --to hub"
    )
    export.add_argument("--output", type=Path, help="file or folder to write; default: in exports/ of the run folder")

    importer = verb("import-openselfsup", _import, "convert a checkpoint of the authors' code")
    importer.add_argument("file", type=Path, help="training checkpoint of the authors' code")
    importer.add_argument("--output", type=Path, help="file to write; default: FILE with the suffix .mcl.pt")

    convert = verb(
        "convert",
        _convert,
        "write annotations in COCO format, for mcl finetune",
        description="Writes PASCAL VOC annotations in COCO format. Objects marked difficult keep their mark.",
    )
    convert.add_argument("format", choices=["voc"], help="voc: PASCAL VOC")
    convert.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="e.g. VOCdevkit/VOC2007")
    convert.add_argument(
        "--ids", default="", help="image set, e.g. trainval, or file with one id per line; default: all"
    )
    convert.add_argument(
        "--output",
        type=Path,
        required=True,
        help="file to write, at or above the images, e.g. VOCdevkit/voc_train.json",
    )

    finetune = verb(
        "finetune",
        _finetune,
        "train a detector in MMDetection",
        description="Trains a detector from given weights, or continues the run of the same name. Writes to "
        "output/name/.",
    )
    finetune.add_argument("config", type=Path, help="preset, such as mask_rcnn_r50_fpn_1x, or Python file")
    add_overrides(finetune, "keys of the file, e.g. weights=runs/mcl/checkpoints/last.pt data.root=FOLDER name=NAME")
    finetune.add_argument(
        "--repeats", type=int, metavar="N", help="train with N seeds and write a table of means and standard deviations"
    )
    finetune.add_argument(
        "--compare",
        type=Path,
        metavar="FOLDER",
        help="run folder of other repeats; the table also compares with these, seed by seed",
    )

    detect = verb(
        "detect",
        _detect,
        "draw the detections of a fine-tuned detector",
        description="Draws boxes, masks, categories and scores into PNG files, and prints one line per file.",
    )
    detect.add_argument("detector", metavar="run", type=Path, help="run folder of mcl finetune, or a checkpoint in it")
    detect.add_argument("images", type=Path, nargs="+", help="files or folders")
    detect.add_argument("--threshold", type=float, default=0.3, help="lowest score that is drawn; default: 0.3")
    detect.add_argument("--output", type=Path, help="folder to write; default: detections/ of the run folder")

    preview = verb(
        "preview",
        _preview,
        "draw the montages of a step, and feature maps of a checkpoint",
        description="Draws the montages that training makes of your images. It trains nothing and needs no GPU.",
    )
    preview.add_argument("config", type=Path, help="preset, YAML file, or checkpoint (draws feature maps, too)")
    add_overrides(preview, "e.g. data.root=FOLDER")
    preview.add_argument("--step", type=int, default=0, help="step of the run to draw, counted from 0")
    preview.add_argument(
        "--output",
        type=Path,
        help="folder to write; default: preview/ of the run folder",
    )

    index = verb("index", _index, "read and store the sizes of all images, so that runs start faster")
    index.add_argument("config", type=Path, help="preset or YAML file")
    add_overrides(index, "e.g. data.root=FOLDER data.index=FOLDER")

    budget = verb("budget", _budget, "compute the cost of a configuration: FLOPs, memory, hours")
    budget.add_argument("config", type=Path, help="preset or YAML file")
    add_overrides(budget, "e.g. montage.queries=[4,1,1,1]")
    budget.add_argument(
        "--images",
        type=int,
        help="images per epoch; default: the number in the index of data.root, or that of ImageNet-1k",
    )
    budget.add_argument("--gpus", type=int, help="number of GPUs; default: so many that each has 128 images")
    budget.add_argument("--nodes", type=int, help="number of machines; default: so many that each has up to 8 GPUs")
    budget.add_argument(
        "--bandwidth",
        type=_numbers,
        metavar="WITHIN,BETWEEN",
        help="GB/s in one direction, of a GPU within its node and of a node to other nodes; default: published figures",
    )
    budget.add_argument("--json", action="store_true", help="print JSON instead of tables")
    budget.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the FLOPs of each part into this file")

    install = verb(
        "install-mmdet",
        _install_mmdet,
        "install MMDetection, for mcl finetune",
        description="Installs MMDetection without changing PyTorch. Builds mmcv, which takes 8 minutes on 2 cores.",
    )
    install.add_argument(
        "--fork", choices=["openmmlab", "onedl"], default="openmmlab", help="onedl: the maintained fork"
    )

    verb("presets", _presets, "list the presets of mcl pretrain and mcl finetune")

    config = verb("config", _config, "print a configuration with all keys")
    config.add_argument("config", type=Path, nargs="?", help="preset or YAML file")
    add_overrides(config, "e.g. trainer.epochs=10")
    config.add_argument("--schema", action="store_true", help="print the JSON schema of all keys, for editors")

    doctor = verb("doctor", _doctor, "report what is installed and what is used, and why")
    doctor.add_argument(
        "--measure",
        nargs="?",
        const="",
        metavar="PRESET",
        help="time image loading with each engine and device, and recommend one for a preset or YAML file (default: "
        "mcl_r50_fpn_100e_in1k)",
    )
    add_overrides(doctor, "with --measure, e.g. data.root=/data/imagenet/train; default: the repository's photographs")
    return parser


def _words(text: str) -> list[str]:
    return text.split(",")


def _numbers(text: str) -> list[float]:
    return [float(word) for word in text.split(",")]


def _keys() -> str:
    """Documentation of every key, from the configuration's own fields."""
    lines = []
    for key in all_keys():
        default = key.default if isinstance(key.default, str) else json.dumps(key.default)
        lines.append(f"  {key.name}  ({_type_name(key.kind)}, default {default or repr(default)})")
        lines.append(
            textwrap.fill(
                key.documentation, 100, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False
            )
        )
    return "\n".join(lines)


def _type_name(kind: Any) -> str:
    """As in auto | int | list[int]."""
    origin, inner = get_origin(kind), [a for a in get_args(kind) if a is not ...]
    if origin is Literal:
        return " | ".join(inner)
    if origin is Annotated:
        return _type_name(inner[0])
    if origin is tuple:
        return f"list[{' | '.join(dict.fromkeys(map(_type_name, inner)))}]"
    return " | ".join(map(_type_name, inner)) if origin else kind.__name__


def _pretrain(options: argparse.Namespace) -> Iterable[str]:
    from mcl import commands, config

    commands.run(config.load(options.config, options.overrides))
    return ()


def _evaluate(options: argparse.Namespace) -> Iterable[str]:
    from mcl import commands, evaluation

    return map(evaluation.describe, commands.evaluate(options.name, options.checkpoint, options.overrides))


def _embed(options: argparse.Namespace) -> Iterable[str]:
    from mcl import commands

    plot, overrides = options.plot, options.overrides
    if "=" in plot:  # a key after a bare --plot
        plot, overrides = "pca", [*overrides, plot]
    return commands.embed(options.checkpoint, options.images, options.out, options.features, plot, overrides)


def _export(options: argparse.Namespace) -> Iterable[object]:
    from mcl.exporters import export

    yield export(
        options.checkpoint,
        options.to,
        parts=options.parts,
        network=options.network,
        statistics_of=options.statistics,
        check=options.verify,
        output=options.output,
        classifier=options.classifier,
        overrides=options.overrides,
    )


def _import(options: argparse.Namespace) -> Iterable[object]:
    from mcl.exporters import openselfsup

    yield openselfsup.import_file(options.file, options.output or options.file.with_suffix(".mcl.pt"))


def _convert(options: argparse.Namespace) -> Iterable[str]:
    from mcl.finetune import voc

    yield voc.convert(options.folders, options.output, options.ids)


def _finetune(options: argparse.Namespace) -> Iterable[str]:
    from torch.distributed.elastic.multiprocessing.errors import record

    from mcl import distributed
    from mcl.finetune import finetune

    with distributed.naming_peers():
        table = record(finetune)(options.config, options.overrides, options.repeats, options.compare) or ""
    if distributed.rank() == 0 and table:
        yield table.rstrip()


def _detect(options: argparse.Namespace) -> Iterable[object]:
    from mcl.finetune import detect

    return detect(options.detector, options.images, options.output, options.threshold)


def _preview(options: argparse.Namespace) -> Iterable[object]:
    from mcl import commands

    return commands.preview(options.config, options.overrides, options.step, options.output)


def _index(options: argparse.Namespace) -> Iterable[str]:
    from mcl import commands, config

    return commands.index(config.load(options.config, options.overrides).data)


def _budget(options: argparse.Namespace) -> Iterable[str]:
    from mcl import budget, config
    from mcl.budget import show

    if options.plot:
        show.check_picture(options.plot)
    cfg = config.load(options.config, options.overrides)
    result = budget.budget(cfg, options.gpus, options.nodes, options.bandwidth, options.images)
    yield json.dumps(result, indent=1) if options.json else show.tables(result)
    if options.plot:
        show.plot(result, options.plot)


def _install_mmdet(options: argparse.Namespace) -> Iterable[str]:
    script = DETECTORS.parent / "install" / "install.sh"
    sys.exit(subprocess.run(["bash", str(script), sys.executable, options.fork], check=False).returncode)


def _presets(options: argparse.Namespace) -> Iterable[str]:
    for use, folder, kind in (("pretrain", PRESETS, "yaml"), ("finetune", DETECTORS, "py")):
        yield f"mcl {use}"
        for file in sorted(folder.glob(f"*.{kind}")):
            yield f"  {file.stem:<36}  {file.read_text().splitlines()[0].removeprefix('# ').removesuffix('.')}"


def _config(options: argparse.Namespace) -> Iterable[str]:
    import yaml

    from mcl import config

    if options.schema:
        yield json.dumps(config.schema(), indent=1)
    elif options.config is None:
        raise ConfigError("name a preset or a YAML file; mcl presets lists the presets")
    else:
        cfg = config.load(options.config, options.overrides)
        yield yaml.safe_dump(config.to_dict(cfg), sort_keys=False).rstrip()


def _doctor(options: argparse.Namespace) -> Iterable[str]:
    from mcl import doctor

    if options.measure is not None:
        from mcl.measure import measure

        yield from measure([options.measure] * bool(options.measure) + options.overrides)
        return
    if options.overrides:
        raise ConfigError("key=value arguments need --measure")
    checks = doctor.checks()
    yield doctor.report(checks)
    sys.exit(0 if doctor.ok(checks) else 1)
