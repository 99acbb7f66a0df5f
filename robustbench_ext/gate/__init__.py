"""The engine of the pytest plugin: measurements, expectations, baselines. Imported when a test asks for the fixture."""
