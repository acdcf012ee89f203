"""What a TPU would need for a config, found by compiling for it on a machine without one (`launch/compile_check.py`)."""
