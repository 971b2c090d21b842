"""Who fires: firing orders, and (to come) profiling and predictor training."""
