"""Runs a PPO job the way a plan says: Ray actors, FSDP trainers, rollout engines and the loop that
drives them."""
