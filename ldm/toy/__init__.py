"""The generated scenes of the demo, with their captions, detector and small extractors."""
