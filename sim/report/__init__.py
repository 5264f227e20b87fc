"""What people see of results: tables, pages, timelines and explanations."""
