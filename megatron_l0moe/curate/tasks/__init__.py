"""How the heavy steps of curate are cut into units of work and run by datatrove's executors."""
