"""Before MLflow's server starts: migrate its tables and its accounts' tables, make its clients' accounts and champions' models.

Any number of these may start at once: they take turns by a lock in the database. The accounts are those of
`MLFLOW_CLIENTS` (`name:password,name:password`); a changed password is taken over.

Who creates a model in MLflow manages it. So the models of champions, those of `MLFLOW_CHAMPIONS`, are made here, before any client
can, and of the clients `promoter` alone gets a right to them: steps register candidates in models of their own.
"""

import os
import sys
import time

import psycopg
from mlflow import db
from mlflow.exceptions import MlflowException
from mlflow.server.auth.permissions import MANAGE
from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore as Accounts
from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as Models

LOCK = 0x66666E  # any number that nothing else in this database locks
PROMOTER = "promoter"
MODEL = "registered_model"

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


def prepare(uri: str) -> None:
    db.upgrade.callback(uri)  # the command `mlflow db upgrade`
    accounts, models = Accounts(), Models(uri)
    accounts.init_db(uri)  # migrates them too
    clients = dict(client.partition(":")[::2] for client in listed("MLFLOW_CLIENTS"))
    for name, password in clients.items():
        if not accounts.has_user(name):
            accounts.create_user(name, password)
        elif not accounts.authenticate_user(name, password):
            accounts.update_user(name, password=password)
    for champions in listed("MLFLOW_CHAMPIONS"):
        if not models.search_registered_models(f"name = '{champions}'"):
            models.create_registered_model(champions)
        for name in clients:
            if name == PROMOTER:
                accounts.grant_user_permission(name, MODEL, champions, MANAGE.name)
            else:
                revoke(accounts, name, champions)


def revoke(accounts: Accounts, name: str, model: str) -> None:
    """Take from an account what it was given on a model: that of an installation which made it before this file did."""
    try:
        accounts.revoke_user_resource_permission(name, MODEL, model)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise


def listed(variable: str) -> list[str]:
    return [part for part in os.environ.get(variable, "").split(",") if part]


def main() -> None:
    with connected() as connection:
        connection.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
        prepare(os.environ["MLFLOW_BACKEND_STORE_URI"])
    print("prepared: tables migrated, accounts made", flush=True)


if __name__ == "__main__":
    try:
        main()
    except psycopg.OperationalError as error:
        sys.exit(f"{DATABASE} does not answer: {error}")
