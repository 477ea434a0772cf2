"""Studies of autoscaling."""
