"""Research tools: look into a Backpack, edit, teach, measure and convert it. See lab/README.md."""
