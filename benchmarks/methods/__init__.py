"""Tables that compare methods in the toy world: `python -m concept_atelier.benchmarks.methods --table actions`."""
