"""Cities, with the country, continent and language that most people would name: what `ravel_pairs` asks for."""

from __future__ import annotations

_TABLE = """
France|Europe|French|Paris Lyon Marseille Bordeaux Nice Nantes Strasbourg
Germany|Europe|German|Berlin Munich Hamburg Cologne Frankfurt Stuttgart Leipzig Dresden
Italy|Europe|Italian|Rome Milan Naples Turin Florence Venice Bologna Genoa Palermo
Spain|Europe|Spanish|Madrid Barcelona Seville Valencia Bilbao Malaga Zaragoza
Portugal|Europe|Portuguese|Lisbon Porto Coimbra Braga
Poland|Europe|Polish|Warsaw Krakow Gdansk Wroclaw Poznan Lodz
Russia|Europe|Russian|Moscow Kazan Novgorod Samara Smolensk
Greece|Europe|Greek|Athens Thessaloniki Patras Sparta
Sweden|Europe|Swedish|Stockholm Gothenburg Malmo Uppsala
Norway|Europe|Norwegian|Oslo Bergen Trondheim Stavanger
Denmark|Europe|Danish|Copenhagen Aarhus Odense
Finland|Europe|Finnish|Helsinki Tampere Turku
Hungary|Europe|Hungarian|Budapest Debrecen Szeged
Ukraine|Europe|Ukrainian|Kyiv Lviv Odessa Kharkiv
Romania|Europe|Romanian|Bucharest Cluj Timisoara
Netherlands|Europe|Dutch|Amsterdam Rotterdam Utrecht Eindhoven
England|Europe|English|London Manchester Liverpool Birmingham Leeds Bristol Oxford Cambridge
Ireland|Europe|English|Dublin Cork Galway Limerick
China|Asia|Chinese|Beijing Shanghai Guangzhou Shenzhen Wuhan Chengdu Nanjing Tianjin
Japan|Asia|Japanese|Tokyo Osaka Kyoto Hiroshima Sapporo Kobe Fukuoka
India|Asia|Hindi|Delhi Mumbai Jaipur Lucknow Agra Varanasi Kanpur
Iran|Asia|Persian|Tehran Isfahan Shiraz Tabriz Mashhad
Iraq|Asia|Arabic|Baghdad Basra Mosul Najaf
Syria|Asia|Arabic|Damascus Aleppo Homs
Israel|Asia|Hebrew|Jerusalem Haifa
Turkey|Asia|Turkish|Ankara Istanbul Izmir Antalya Bursa
Thailand|Asia|Thai|Bangkok Phuket Pattaya
Vietnam|Asia|Vietnamese|Hanoi Saigon Hue
Indonesia|Asia|Indonesian|Jakarta Bandung Surabaya
Pakistan|Asia|Urdu|Karachi Lahore Islamabad Peshawar
Egypt|Africa|Arabic|Cairo Alexandria Luxor Giza
Morocco|Africa|Arabic|Casablanca Rabat Marrakesh Fez
Algeria|Africa|Arabic|Algiers Oran
Tunisia|Africa|Arabic|Tunis Sfax
Kenya|Africa|Swahili|Nairobi Mombasa Kisumu
Nigeria|Africa|English|Lagos Abuja Kano Ibadan
Ghana|Africa|English|Accra Kumasi
Ethiopia|Africa|Amharic|Gondar Harar
Brazil|America|Portuguese|Brasilia Salvador Recife Fortaleza Curitiba
Argentina|America|Spanish|Rosario Mendoza Cordoba
Peru|America|Spanish|Lima Cusco Arequipa Trujillo
Chile|America|Spanish|Santiago Valparaiso Concepcion
Colombia|America|Spanish|Bogota Medellin Cali Cartagena
Mexico|America|Spanish|Guadalajara Monterrey Puebla Tijuana Cancun
Cuba|America|Spanish|Havana
Canada|America|English|Toronto Vancouver Ottawa Calgary Edmonton Winnipeg
Australia|Oceania|English|Sydney Melbourne Brisbane Perth Adelaide Canberra
"""


def cities() -> dict[str, dict[str, str]]:
    """Returns country, continent and language by city; names are one word each."""
    found: dict[str, dict[str, str]] = {}
    for line in _TABLE.strip().splitlines():
        country, continent, language, names = line.split("|")
        values = {"country": country, "continent": continent, "language": language}
        found |= {name: values for name in names.split()}
    return found
