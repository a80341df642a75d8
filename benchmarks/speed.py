"""How fast a method is: python -m concept_atelier.benchmarks.speed adi | gcfg | layout | reference [--quick]"""

from __future__ import annotations

import argparse

from . import speed_adi, speed_attention_loss, speed_gcfg, speed_layout, speed_reference

MEASURED = {
    "adi": (speed_adi,),
    "gcfg": (speed_gcfg,),
    "layout": (speed_layout, speed_attention_loss),
    "reference": (speed_reference,),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m concept_atelier.benchmarks.speed", description=__doc__)
    parser.add_argument("method", choices=MEASURED, help="the method to measure")
    parser.add_argument("--quick", action="store_true", help="fewer steps and, on a CPU, smaller latents")
    options = parser.parse_args()
    for benchmark in MEASURED[options.method]:
        benchmark.run(options.quick)


if __name__ == "__main__":
    main()
