"""Before MLflow's server starts: migrate its tables and its accounts' tables, and make the accounts of its clients.

Any number of these may start at once: they take turns by a lock in the database. The accounts are those of
`MLFLOW_CLIENTS` (`name:password,name:password`); a changed password is taken over.
"""

import os
import sys
import time

import psycopg
from mlflow import db
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

LOCK = 0x66666E  # any number that nothing else in this database locks


HOST = os.environ.get("PGHOST", "localhost")
DATABASE = f"PostgreSQL at {HOST}:{os.environ.get('PGPORT', '5432')}"
PATIENCE = 120.0
"""Seconds in which a database that starts together with this is waited for."""


def connected() -> psycopg.Connection:
    """A connection with the database, once it answers; what it is waited for is said whenever that changes."""
    deadline, said = time.monotonic() + PATIENCE, ""
    while True:
        try:
            # The host by name: psycopg calls one that libpq takes from the environment None where it cannot be resolved.
            return psycopg.connect(host=HOST, autocommit=True, connect_timeout=10)
        except psycopg.OperationalError as error:
            if time.monotonic() > deadline:
                raise
            if (why := str(error).splitlines()[0]) != said:
                print(f"waiting for {DATABASE}: {why}", flush=True)
            said = why
        time.sleep(1)


def main() -> None:
    uri = os.environ["MLFLOW_BACKEND_STORE_URI"]
    with connected() as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
        db.upgrade.callback(uri)  # the command `mlflow db upgrade`
        accounts = SqlAlchemyStore()
        accounts.init_db(uri)  # migrates them too
        for client in filter(None, os.environ.get("MLFLOW_CLIENTS", "").split(",")):
            name, _, password = client.partition(":")
            if not accounts.has_user(name):
                accounts.create_user(name, password)
            elif not accounts.authenticate_user(name, password):
                accounts.update_user(name, password=password)
    print("prepared: tables migrated, accounts made", flush=True)


if __name__ == "__main__":
    try:
        main()
    except psycopg.OperationalError as error:
        sys.exit(f"{DATABASE} does not answer: {error}")
