"""What each tenant may use and has used. No HTTP here: `gateway.api` asks, answers and reports."""
