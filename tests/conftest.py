"""What every test gets: the fixture `cluster`, and the check that nothing is left on the machine afterwards."""

pytest_plugins = ["tests.cluster.plugin", "tests.models_for_tests"]
