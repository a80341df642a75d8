"""The only place that knows the internals of ComfyUI."""
