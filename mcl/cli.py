"""The verbs of ``mcl``: arguments in, one call, words out."""

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
    "stopping; in training after this step, with a checkpoint; a second signal ends within 10 seconds without saving\n"
)

Run = Callable[[argparse.Namespace], Iterable[object]]
"""What a verb does; what it yields is printed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: parses, runs, and turns errors of our own into one line and their exit code, mostly 2."""
    # Threads of OpenMP sleep while they wait: on a busy machine, spinning takes the cores from those that have work.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # is read when torch is imported
    parser = _parser()
    options, words = parser.parse_known_args(arguments)  # key=value may stand behind options, too
    if words and not ("overrides" in options and all("=" in word and not word.startswith("-") for word in words)):
        hint = "; keys are set by key=value, such as trainer.epochs=3" if "overrides" in options else ""
        parser.error(f"unrecognized arguments: {' '.join(words)}{hint}")
    if words:
        options.overrides = [*options.overrides, *words]
    worker = "MCL_LAUNCHED" in os.environ  # by mcl.distributed.local, which says what ends a process
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
    except BrokenPipeError:  # who read the output, such as head, has enough
        _discard_output()
        sys.exit(128 + signal.SIGPIPE)
    except (ValueError, RuntimeError, OSError) as error:
        if type(error).__module__.split(".")[0] in ("mcl", "dali_pipelines"):  # those for users are classes of our own
            message = str(error)
        elif isinstance(error, OSError) and error.filename is not None:  # such as a name that is too long
            message = f"{error.filename}: {error.strerror}"
        else:
            raise
        if not worker:
            print(f"mcl {options.verb}: error: {message}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))


def _prepare() -> None:
    """Makes up for what the environment may lack, before libraries fail for want of it.

    Raises:
        ConfigError: it cannot be made up for.
    """
    for name in ("stdin", "stdout", "stderr"):  # closed by whoever started this; files that are opened later must not
        if getattr(sys, name) is None:  # take their places
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: names of files need not fit the encoding
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the current folder is gone; change to one that exists") from None
    try:
        tempfile.gettempdir()
    except FileNotFoundError:
        raise ConfigError("no folder for temporary files can be written to; set TMPDIR to one that can") from None


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
    """Of what Python has not written yet, and would in the end."""
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
        description="Pre-trains, or continues the run of that name. Writes output/name/.",
        epilog="keys (key=value overrides the YAML file):\n\n" + _keys(),
    )
    pretrain.add_argument("config", type=Path, help="preset, such as mcl_r50_fpn_100e_in1k, or YAML file")
    add_overrides(pretrain, "e.g. data.root=/data/imagenet/train")

    evaluate = verb(
        "evaluate",
        _evaluate,
        "score a checkpoint beside its random initialisation",
        description="Scores a checkpoint beside its random initialisation, on data.root and data.val_root.",
        epilog=textwrap.dedent("""\
            retrieval  whether a tile's embedding is nearest to that of its own image, among evaluation.gallery images
            knn        class by the evaluation.k nearest training images, by the cosine of pooled features, weighted
            linear     class by a logistic regression on these features
            svm        mean average precision of a support vector machine for each class; images may have several, which
                       evaluation.annotations and evaluation.val_annotations say
            regions    class of the objects of a COCO-format folder, evaluation.regions, by neighbours and regression on
                       features that are pooled from the pyramid

            evaluation.features says which these are, evaluation.labels of how many images the class is known; scores of
            a run's checkpoint also go to its evaluations.jsonl and report.html.
            """),
    )
    evaluate.add_argument("name", choices=["retrieval", "knn", "linear", "svm", "regions"])
    evaluate.add_argument("checkpoint", type=Path, help="e.g. runs/demo/checkpoints/last.pt")
    add_overrides(evaluate, "e.g. data.root=FOLDER data.val_root=FOLDER")

    embed = verb(
        "embed",
        _embed,
        "write the features of images to a file",
        description="Writes a row of features for each image, or goes on with a file that was begun.",
    )
    embed.add_argument("checkpoint", type=Path, help="e.g. runs/demo/checkpoints/last.pt")
    embed.add_argument("images", help="folder, list file or shards, as data.root")
    add_overrides(embed, "e.g. data.source=flat montage.cells=7")
    embed.add_argument("--out", type=Path, required=True, metavar="FILE", help=".npy (and .json beside it) or .parquet")
    embed.add_argument(
        "--features",
        choices=FEATURES,
        default="c5",
        help="mean over space of a stage of the backbone or a level of the pyramid, or the projector's; default: c5",
    )
    embed.add_argument(
        "--plot",
        choices=["pca", "umap"],
        nargs="?",
        const="pca",
        default="",
        help="draw a map of the images (FILE.png; pca if not said) and their nearest neighbours (FILE.html)",
    )

    export = verb("export", _export, "hand the weights to another library")
    export.add_argument("checkpoint", type=Path, help="e.g. runs/demo/checkpoints/last.pt")
    add_overrides(export, "e.g. data.root=FOLDER, for --network target and --statistics")
    export.add_argument(
        "--to", required=True, choices=TARGETS, help="the library that reads them; hub: a folder to share"
    )
    export.add_argument("--parts", type=_words, default=[], help="e.g. backbone,fpn,head; default: all that it takes")
    export.add_argument(
        "--network", choices=["online", "target"], default="online", help="target: the momentum network"
    )
    export.add_argument(
        "--statistics",
        default="",
        metavar="FOLDER|none",
        help="photographs for BatchNorm's statistics; default: data.root, for libraries that freeze them",
    )
    export.add_argument(
        "--classifier", action="store_true", help="of objective=supervised the classifier, too; --to hub has a place"
    )
    export.add_argument("--verify", action="store_true", help="load them into the library's model, compare features")
    export.add_argument("--output", type=Path, help="file or folder to write; default: in exports/ of the run folder")

    importer = verb("import-openselfsup", _import, "turn the authors' released checkpoint into ours")
    importer.add_argument("file", type=Path)
    importer.add_argument("--output", type=Path, help="file to write; default: FILE with the ending .mcl.pt")

    convert = verb(
        "convert",
        _convert,
        "write annotations in COCO's format, for mcl finetune",
        description="Writes PASCAL VOC's annotations in COCO's format. Objects that are difficult are marked so.",
    )
    convert.add_argument("format", choices=["voc"])
    convert.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="e.g. VOCdevkit/VOC2007")
    convert.add_argument(
        "--ids", default="", help="image set, e.g. trainval, or file with an id per line; default: all"
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
        description="Trains a detector from given weights, or continues the run of that name. Writes output/name/.",
    )
    finetune.add_argument("config", type=Path, help="preset, such as mask_rcnn_r50_fpn_1x, or Python file")
    add_overrides(finetune, "keys of that file, e.g. weights=runs/mcl/checkpoints/last.pt data.root=FOLDER name=NAME")
    finetune.add_argument(
        "--repeats", type=int, metavar="N", help="train with N seeds, and write a table of mean and standard deviation"
    )
    finetune.add_argument(
        "--compare", type=Path, metavar="FOLDER", help="of other repeats; adds the paired difference to the table"
    )

    detect = verb(
        "detect",
        _detect,
        "draw what a fine-tuned detector finds",
        description="Draws boxes, masks, categories and scores into PNG files, and prints a line for each.",
    )
    detect.add_argument(
        "detector", metavar="run", type=Path, help="folder of a run of mcl finetune, or a checkpoint in one"
    )
    detect.add_argument("images", type=Path, nargs="+", help="files or folders")
    detect.add_argument("--threshold", type=float, default=0.3, help="score that is drawn at least; default: 0.3")
    detect.add_argument("--output", type=Path, help="folder to write; default: detections/ of the run folder")

    preview = verb("preview", _preview, "draw a step's montages, and a checkpoint's feature maps")
    preview.add_argument("config", type=Path, help="preset, YAML file, or a checkpoint (then with feature maps)")
    add_overrides(preview, "e.g. data.root=FOLDER")
    preview.add_argument("--step", type=int, default=0, help="step of the run to draw, from 0")
    preview.add_argument(
        "--output",
        type=Path,
        help="folder to write; default: preview/ of the run folder, output/name or the checkpoint's",
    )

    index = verb("index", _index, "read and keep the sizes of all images, so that runs start faster")
    index.add_argument("config", type=Path, help="preset or YAML file")
    add_overrides(index, "e.g. data.root=FOLDER data.index=FOLDER")

    budget = verb("budget", _budget, "what a configuration costs: FLOPs, memory, hours")
    budget.add_argument("config", type=Path, help="preset or YAML file")
    add_overrides(budget, "e.g. montage.queries=[4,1,1,1]")
    budget.add_argument(
        "--images",
        type=int,
        help="of an epoch; default: those in the index of data.root, or as many as ImageNet-1k has",
    )
    budget.add_argument("--gpus", type=int, help="processes; default: as many as make 128 images each")
    budget.add_argument("--nodes", type=int, help="machines that they are on; default: as few as have 8 each")
    budget.add_argument(
        "--bandwidth",
        type=_numbers,
        metavar="WITHIN,BETWEEN",
        help="GB/s in one direction, of a GPU within its node and of a node to others; default: published ones",
    )
    budget.add_argument("--json", action="store_true", help="print JSON, and nothing else")
    budget.add_argument("--plot", type=Path, metavar="FILE.png", help="picture to write")

    install = verb(
        "install-mmdet",
        _install_mmdet,
        "install MMDetection, for mcl finetune",
        description="Installs MMDetection beside PyTorch, which stays as it is. Builds mmcv: 8 minutes on 2 cores.",
    )
    install.add_argument(
        "--fork", choices=["openmmlab", "onedl"], default="openmmlab", help="onedl: a fork that is maintained"
    )

    verb("presets", _presets, "list the configurations that are known by their names")

    config = verb("config", _config, "print a configuration with all of its keys")
    config.add_argument("config", type=Path, nargs="?", help="preset or YAML file")
    add_overrides(config, "e.g. trainer.epochs=10")
    config.add_argument("--schema", action="store_true", help="print the JSON schema of all keys, for editors")

    doctor = verb("doctor", _doctor, "what is installed, what is used, and why")
    doctor.add_argument(
        "--measure",
        nargs="?",
        const="",
        metavar="PRESET",
        help="time the loading of images by each engine and device, and recommend one for a preset or YAML file",
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

    return commands.embed(
        options.checkpoint, options.images, options.out, options.features, options.plot, options.overrides
    )


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
