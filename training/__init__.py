"""What teaches: rollout, judge, replay, and the loop around them."""
