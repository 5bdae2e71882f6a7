"""The workbook's command line: python -m helpers run | refresh | check | bench | train-organism | doctor."""

import argparse
import sys


def _parser():
    parser = argparse.ArgumentParser(
        prog="python -m helpers", description=__doc__.split(":")[0] + "."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="execute notebooks into build/, then print the claims")
    run.add_argument(
        "notebooks",
        nargs="*",
        metavar="NOTEBOOK",
        help="02, a name or a path (default: all of them)",
    )
    run.add_argument(
        "-p",
        nargs=2,
        action="append",
        default=[],
        dest="parameters",
        metavar=("NAME", "VALUE"),
        help="a parameter for the notebooks that have it",
    )
    run.add_argument("-f", dest="recipe", metavar="RECIPE", help="a YAML file of parameters")
    refresh = commands.add_parser(
        "refresh", help="execute notebooks and put the outputs into notebooks/"
    )
    refresh.add_argument("notebooks", nargs="*", metavar="NOTEBOOK")
    check = commands.add_parser(
        "check", help="are the committed notebooks current, in order and clean?"
    )
    check.add_argument("notebooks", nargs="*", metavar="NOTEBOOK")
    grid = commands.add_parser("grid", help="compute the sweeps kept in data/explorer (resumable)")
    grid.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        help="goldilocks, steps, explorer, refusal, choosing, unlocking, backdoors (default: all)",
    )
    grid.add_argument("--model", help="another model than the default")
    grid.add_argument(
        "--prompts",
        default="everyday",
        metavar="SET",
        help="another set of data/prompts (goldilocks, steps, explorer)",
    )
    grid.add_argument(
        "--workers", type=int, default=2, help="processes of one thread each (default: 2)"
    )
    commands.add_parser("bench", help="measure speed and memory on this machine", add_help=False)
    organism = commands.add_parser(
        "train-organism", help="train a model organism into data/organisms/ and print its card"
    )
    organism.add_argument("name", metavar="NAME", help="refusal, password-cot, backdoor…")
    commands.add_parser(
        "doctor", help="what is right or wrong with this environment, in one screen"
    )
    return parser


def main(argv=None):
    """Run one command and return its exit status: 0 all well, 1 something failed, 2 a wrong command, 130 interrupted."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    if rest and options.command != "bench":
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if options.command == "doctor":  # works before anything is installed
        from helpers.workbook import doctor

        return doctor.main()
    try:
        return _command(options, rest)
    except KeyboardInterrupt:
        print("\nInterrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        print(
            f"{error.name} is not installed; python -m helpers doctor says what is missing.",
            file=sys.stderr,
        )
        return 2


def _command(options, rest):
    if options.command == "bench":
        from helpers.workbook import bench

        return bench.main(rest) or 0
    if options.command == "train-organism":
        from helpers.studies import organisms

        return organisms.main(options.name)
    from helpers.workbook import notebooks, runner

    try:
        if options.command == "grid":
            from helpers.studies import (
                anti_refusal,
                backdoors,
                chain_of_thought,
                choosing,
                goldilocks,
            )

            special = {
                "refusal": anti_refusal.compute,
                "choosing": choosing.compute,
                "unlocking": chain_of_thought.compute,
                "backdoors": backdoors.compute,
            }
            for name in options.names or ("goldilocks", "steps", "explorer", *special):
                where = (
                    special[name](options.model, workers=options.workers)
                    if name in special
                    else goldilocks.compute(
                        name, options.model, options.workers, prompt_set=options.prompts
                    )
                )
                print(f"wrote {where}")
            return 0
        if options.command == "check":
            problems = notebooks.check(options.notebooks)
            print("\n".join(problems) or "The committed notebooks are current, in order and clean.")
            return bool(problems)
        if options.command == "refresh":
            return bool(runner.refresh(options.notebooks))
        parameters = {name: runner.parse_value(value) for name, value in options.parameters}
        return bool(runner.run(options.notebooks, parameters, options.recipe))
    except notebooks.UserError as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
