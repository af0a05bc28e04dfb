"""The verb purify: plan, shards, stages and the run."""
