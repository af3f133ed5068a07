"""The engine: taps, plan, pipeline, store. It knows no framework and draws nothing."""
