"""`make bench`: figures of single layers, short; writes runs/bench/figures-ISA.json, .md, .png.

    python -m bench [arguments of bench.figures]      e.g. --group conv1x1 --rounds 9 --isa avx2

Several minutes. Whole networks take as long again and are left out: ``--group sparsify``.
"""

from pathlib import Path

import dass_kernels
from bench import figures, plot
from bench.session import exit_on_failures, parse
from bench.table import figures_table, rows_table

ROUNDS = 3
GROUPS = [name for name in figures.GROUPS if name != "sparsify"]


def main(arguments: list[str] | None = None) -> None:
    parser = figures.parser()
    parser.set_defaults(rounds=ROUNDS, group=GROUPS)
    options = parse(parser, arguments)
    isa = options.isa or dass_kernels.active_isa()
    options.json = options.json or Path("runs") / "bench" / f"figures-{isa}.json"
    document = figures.measure_groups(options)
    text = figures_table(document)
    rows = rows_table(document["rows"])
    options.json.with_suffix(".md").write_text(f"{text}\n\n{rows}\n")
    try:
        plot.plot(document, options.json.with_suffix(".png"))
    except (ImportError, ValueError) as reason:
        print(f"no plot: {reason}")
    print(f"\n{text}\n\nwritten: {options.json.with_suffix('')}.json, .md, .png")
    exit_on_failures(document)


if __name__ == "__main__":
    main()
