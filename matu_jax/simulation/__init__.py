"""A federation simulated on the devices at hand, round by round."""
