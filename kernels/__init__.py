"""The mathematics of the five methods in plain torch: nothing here knows ComfyUI."""
