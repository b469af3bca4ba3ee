"""The paper's tables as commands: mnclglf reproduce table3 | table4 | table5 | table6."""
