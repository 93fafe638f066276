"""Research tools: look into a Backpack, edit, teach, measure and convert it. See lab/README.md."""

import configurator  # noqa: F401  # before torch, for which it sets the environment
