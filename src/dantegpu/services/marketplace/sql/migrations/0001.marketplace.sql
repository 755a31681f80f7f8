-- What a provider asks for one machine; a machine without a row has the default ask of the settings.
CREATE TABLE asks (
    machine_id uuid PRIMARY KEY,
    team_id uuid NOT NULL,
    price_udgpu_per_gpu_hour bigint NOT NULL CHECK (price_udgpu_per_gpu_hour >= 0),
    price_udgpu_per_cpu_hour bigint NOT NULL CHECK (price_udgpu_per_cpu_hour >= 0),
    updated_at timestamptz NOT NULL
);
