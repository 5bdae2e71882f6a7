"""The workbook's command line: python -m helpers COMMAND. Each command imports what it needs."""

import argparse
import json
import sys
from pathlib import Path

from helpers import ROOT, UserError


def parser() -> argparse.ArgumentParser:
    main = argparse.ArgumentParser(prog="python -m helpers")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, about):
        return commands.add_parser(name, help=about, description=about)

    run = add("run", "execute notebooks into build/, then print the claims")
    refresh = add("refresh", "execute notebooks and put the outputs into notebooks/")
    check = add("check", "are the committed notebooks current, in order and clean?")
    for command in (run, refresh, check):
        command.add_argument("notebooks", nargs="*", metavar="NOTEBOOK", help="02 (default: all)")
    for command in (run, refresh):
        about = "notebooks at a time (default: 2), each on one thread where N > 1"
        command.add_argument("--workers", type=int, metavar="N", help=about)
    pair = {"nargs": 2, "metavar": ("NAME", "VALUE"), "help": "a notebook's parameter"}
    run.add_argument("-p", action="append", default=[], **pair)
    run.add_argument("-f", dest="recipe", metavar="RECIPE", help="a YAML file of parameters")
    run.add_argument("--model", help="another model: layers at the same depth, R measured on it")
    sweep = add("sweep", "compute the sweeps kept in data/sweeps (resumable)")
    sweep.add_argument("names", nargs="*", metavar="NAME", help="which (default: all of them)")
    sweep.add_argument("--model", help="another model than the default")
    sweep.add_argument("--prompts", default="everyday", metavar="SET", help="a set of data/prompts")
    sweep.add_argument("--workers", type=int, default=2, help="processes of one thread (default 2)")
    judge = add(
        "judge", "judge texts of your own: changed? fluent? with κ where labels stand beside"
    )
    judge.add_argument("file", metavar="FILE.json", help='[{"prompt", "clean", "text"}, …]')
    judge.add_argument(
        "-o", dest="out", metavar="OUT.json", help="where the rows go (else printed)"
    )
    judge.add_argument("--model", help="another model than the default")
    bench = add("bench", "measure speed and memory on this machine, against the published loop")
    bench.add_argument("--model", help="another model than the default")
    bench.add_argument("--steps", type=int, default=300, help="of the published loop (300)")
    instead = bench.add_mutually_exclusive_group()
    other = {"dest": "kind", "action": "store_const", "default": "bench"}
    instead.add_argument("--scaling", const="scaling", help="how cost grows with size", **other)
    instead.add_argument("--gpu", const="gpu", help="parity, a 7B shape, tokens on CUDA", **other)
    bench.add_argument("--out", metavar="FOLDER", help="where the record goes (default: build)")
    train = add("train-organism", "train a model organism into data/organisms/, print its card")
    train.add_argument("name", metavar="NAME", help="refusal, password-cot, backdoor…")
    train.add_argument("--model", help="another model than the default; goes to build/organisms")
    add("export", "the committed notebooks as web pages in build/html")
    add("doctor", "what is right or wrong with this environment, in one screen")
    return main


def _notebooks(options) -> int:
    """run, refresh, check: 1 where something failed."""
    from helpers.workbook import notebooks, runner

    names = options.notebooks
    if options.command == "check":
        failed = notebooks.check(names)
        print("\n".join(failed) or "The committed notebooks are current, in order and clean.")
    elif options.command == "refresh":
        failed = runner.refresh(names, workers=options.workers)
    else:
        typed = dict(options.p)
        for name in typed:
            if sum(other == name for other, _ in options.p) > 1:
                raise UserError(f"-p {name} stands twice; give one value.")
        failed = runner.run(names, typed, options.recipe, options.model, workers=options.workers)
    return int(bool(failed))


def _sweep(options) -> None:
    from helpers import studies

    for name in options.names:
        if name not in studies.names():
            raise UserError(f"There is no sweep {name!r}; there are {', '.join(studies.names())}.")
    for name in options.names or studies.names():
        print(f"wrote {studies.run(name, options.model, options.workers, options.prompts)}")


def _judge(options) -> None:
    from helpers import ledger, metrics, models
    from helpers.metrics.judging import check_rows

    path = Path(options.file)
    try:
        content = path.read_text(encoding="utf-8")
        rows = json.loads(content, object_pairs_hook=ledger.without_duplicates)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON in UTF-8: {error}.") from None
    check_rows(rows)
    judged = metrics.judge(models.load(options.model) if options.model else models.load(), rows)
    text = json.dumps(judged, indent=1, ensure_ascii=False)
    if options.out:
        try:
            ledger.write_atomically(options.out, text + "\n")
        except OSError as error:
            raise UserError(f"{options.out} cannot be written ({error.strerror}).") from None
        print(f"wrote {options.out}: {len(judged)} texts")
    else:
        print(text)
    print("(The rules were set on English texts: see data/labels.)", file=sys.stderr)
    for line in metrics.agreement_with_labels(judged):
        print(line, file=sys.stderr)


def _refuse_other_clone() -> None:
    from helpers.workbook import doctor

    if other := doctor.other_clone(Path.cwd()):
        helpers = f"Python imports the helpers of {ROOT}"
        raise UserError(f"You are in the clone {other}, but {helpers}: run this in {other} itself.")


def _command(options) -> int:
    if options.command != "doctor":
        _refuse_other_clone()
    if options.command in ("run", "refresh", "check"):
        return _notebooks(options)
    if options.command == "doctor":
        from helpers.workbook import doctor  # works before anything is installed

        return doctor.main()
    if options.command == "bench":
        from helpers.workbook import bench

        return bench.main(options)
    if options.command == "train-organism":
        from helpers.studies import organisms

        return organisms.main(options.name, options.model)
    if options.command == "judge":
        _judge(options)
        return 0
    if options.command == "export":
        from helpers.workbook import export

        print(f"wrote {export.main()}")
    else:
        _sweep(options)
    return 0


def main(argv=None) -> int:
    """Run one command. Returns 0: all well, 1: something failed, 2: not possible, 130: Ctrl-C."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal that has no "→" or "θ" shows "?"
            stream.reconfigure(errors="replace")
    options = parser().parse_args(argv)
    try:
        return _command(options)
    except UserError as error:
        print(error, file=sys.stderr)
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed"
        print(f"{missing}; python -m helpers doctor says what is missing.", file=sys.stderr)
    except OSError as error:  # a folder that may not be written, a full disk
        where = f"{error.filename}: " if error.filename else ""
        print(f"{where}{error.strerror or error}.", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    return 2


if __name__ == "__main__":
    sys.exit(main())
